"""The error for bad input: one sentence that names the value and the mend."""


class UserError(ValueError):
    """Input that a person can mend; programs print its message alone and exit with code 2."""
