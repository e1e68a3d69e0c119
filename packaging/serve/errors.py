"""The one exception that Shipyard raises for a fault that its user can mend."""


class ShipyardError(Exception):
    """Report a fault in one line: what is wrong, the value, what is allowed, the mend.

    `what` names the fault and where it is; the other parts are optional, for not every fault has them.
    """

    def __init__(self, what: str, *, value: object = None, allowed: object = None, mend: str = "") -> None:
        parts = [what]
        if value is not None:
            parts.append(f"value: {value!r}" if isinstance(value, str) else f"value: {value}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if mend:
            parts.append(f"mend: {mend}")
        super().__init__("; ".join(" ".join(part.split()) for part in parts))
