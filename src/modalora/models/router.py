"""Which adapter and which projectors a row uses, by the media it holds (Phi-4-Multimodal, arXiv:2503.01743, 2.2).

One adapter at a time, for every token of the row, unless a sum of several is asked for by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from modalora.contracts import Rule, terms
from modalora.errors import RouteError

ROUTES: dict[frozenset[str], Rule] = {
    frozenset(): Rule(adapter=None),
    frozenset({"image"}): Rule(adapter="vision", branches={"image": "vision"}),
    frozenset({"audio"}): Rule(adapter="speech", branches={"audio": "speech"}),
    frozenset({"image", "audio"}): Rule(adapter="vision", branches={"image": "vision", "audio": "vision"}),
}


def route(
    modalities: Collection[str],
    requested: str = "auto",
    adapters: Collection[str] = (),
    routes: Mapping[frozenset[str], Rule] = ROUTES,
    branches: Mapping[str, Collection[str]] | None = None,
) -> Rule:
    """Return the rule for a row that holds these modalities.

    requested: "auto" follows the routes; "none" or an adapter's name overrides the adapter and keeps the projectors.
    adapters: the adapters that the model has. branches: projectors of a modality that adapters brought along,
    "BRANCH-ADAPTER": rows of the adapter use them in place of BRANCH. Raises RouteError for an unknown route or a
    combination without a rule.
    """
    if not isinstance(requested, str):
        raise RouteError(f"route={requested!r:.60} must be 'auto', 'none' or an adapter's name")
    rule = routes.get(frozenset(modalities))
    if rule is None:
        known = ", ".join(" + ".join(sorted(names)) or "text" for names in routes)
        raise RouteError(f"no route for {' + '.join(sorted(modalities))}; there are routes for {known}")
    if requested == "auto":
        adapter = rule.adapter
    elif requested == "none":
        adapter = None
    else:
        adapter = requested
        if unknown := [name for name, _ in terms(requested) if name not in adapters]:
            raise RouteError(
                f"unknown route {unknown[0]!r}; use one of {', '.join(['auto', 'none', *sorted(adapters)])}, or a sum "
                "such as a+b@0.7"
            )
    if adapter is not None and adapter not in adapters and requested == "auto":
        raise RouteError(
            f"{' + '.join(sorted(modalities))} needs the adapter {adapter!r}, which this model does not have "
            f"(it has {', '.join(sorted(adapters)) or 'none'}); load one with load_adapter, or use --route none"
        )
    if not branches or adapter is None:
        return Rule(adapter=adapter, branches=rule.branches)
    chosen = {kind: _own(branch, adapter, branches.get(kind, ())) for kind, branch in rule.branches.items()}
    return Rule(adapter=adapter, branches=chosen)


def _own(branch: str, adapter: str, branches: Collection[str]) -> str:
    """Return the projector that an adapter brought in place of a branch, else the branch."""
    own = [f"{branch}-{name}" for name, _ in terms(adapter) if f"{branch}-{name}" in branches]
    if len(own) > 1:
        raise RouteError(
            f"the adapters of {adapter!r} bring a projector each in place of {branch!r}; only one can be used"
        )
    return own[0] if own else branch
