"""What can be said to a user when something is wrong: one named error per kind of mistake.

A `UserError` is something the person at the keyboard can put right. Its text says what is wrong, which
values met, and what to do; entry points print the text alone (no traceback) and exit with `EXIT_USER_ERROR`.
Anything else is a defect of ours and keeps its traceback.
"""

EXIT_OK = 0
EXIT_CRASHED = 1
EXIT_USER_ERROR = 2
EXIT_SAVED_ON_SIGNAL = 85
EXIT_NO_PROGRESS = 93
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake in what was asked for or in a file that was given; the text says how to mend it."""

    exit_code = EXIT_USER_ERROR


class ConfigError(UserError):
    """A configuration key or value is unknown, missing or contradicts another one."""


class LayoutError(UserError):
    """A parallel layout does not fit the world size, the model or the window."""


class ThetaError(UserError):
    """A rotary base does not follow from the stage, the law or the checkpoint it starts from."""


class CheckpointError(UserError):
    """A checkpoint is missing, half-written, damaged or of another model."""


class DataError(UserError):
    """Training data is missing, damaged or cut for another window."""


class CanaryError(UserError):
    """Information does not travel through the context-parallel group as it must."""


class JoinError(UserError):
    """Not all ranks came together.

    Args:
        speaker: the rank that tells it.
    """

    exit_code = EXIT_CRASHED

    def __init__(self, text: str, speaker: int) -> None:
        super().__init__(text)
        self.speaker = speaker


class NoProgressError(UserError):
    """A restarted job begins where its last attempt began: another attempt would end the same way."""

    exit_code = EXIT_NO_PROGRESS


class StopRequestedError(UserError):
    """A machine starts again what somebody has asked to stop."""

    exit_code = EXIT_SAVED_ON_SIGNAL
