"""What can go wrong, one class a kind. Every message says what was wrong, the value, and what to do."""


class RotateKVError(Exception):
    """Base of all errors this package raises on purpose; the command line prints them without a traceback."""


class ConfigError(RotateKVError, ValueError):
    """A setting is unknown, out of range, or does not fit the model."""


class InputError(RotateKVError, ValueError):
    """A file, text or model given by the user cannot be used."""


class MatchError(RotateKVError):
    """Attention modules could not be matched; the message lists each rejection with its node."""


class StateError(RotateKVError, RuntimeError):
    """The model or the cache is in a state that does not allow the call."""


class CalibrationError(RotateKVError, ValueError):
    """Calibration statistics are missing, damaged, or belong to another model."""


class PassOrderError(RotateKVError, RuntimeError):
    """A pass was scheduled before a pass that it must run after."""
