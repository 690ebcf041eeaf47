"""The exception that every failed check of the emulator raises, with the place in the program."""


class EmulatorError(Exception):
    """A fault of the kernel or of its launch.

    `check` is a short stable name ("out of bounds", "data race", ...), so that a test can assert which check failed
    without matching the message.
    """

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check
