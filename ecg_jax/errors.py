"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user asked for or handed over: a config field, a file, a folder, a checkpoint.

    The message is one clear sentence that names the file, field or parameter and says what to do. The command
    line prints it without a traceback and exits with code 2.
    """
