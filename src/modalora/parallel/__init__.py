"""What many processes do otherwise than one, behind one set of methods."""
