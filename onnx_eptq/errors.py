"""What can go wrong, as the user would say it: every message names the thing, what was found, what was wanted, what to do."""


class EptqError(Exception):
    """The parent of every error this package raises on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(EptqError):
    """An option, or a combination of options, that cannot be honoured."""

    exit_code = 2


class ModelError(EptqError):
    """The model file cannot be read, or holds nothing that can be quantized."""

    exit_code = 3


class UnsupportedOp(ModelError):
    """Some nodes of the model cannot be simulated."""


class DataError(EptqError):
    """The calibration data is missing, empty, or does not fit the model's inputs."""

    exit_code = 4


class OutputError(EptqError):
    """The output file cannot be written where the user wants it."""

    exit_code = 5


class VerificationError(EptqError):
    """The written file does not compute what was simulated."""

    exit_code = 6


class CoverageError(EptqError):
    """Something stayed float although `--strict` was asked for."""

    exit_code = 7
