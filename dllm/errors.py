"""The two errors a user can meet: what was wanted, what came, what to do, in one line."""


class UserError(ValueError):
    """Bad input: a path, file, configuration, flag or request that cannot work. The command line exits with 2."""


class Failure(RuntimeError):
    """Good input, but the machine could not do it (a full disk, say). The command line exits with 1."""
