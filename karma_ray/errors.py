"""The exceptions that users meet.

Exception
 └─ KarmaRayError          an error raised on purpose by this package; a job exits with 1
     ├─ InputError         the user's input is wrong; a job exits with 2
     ├─ TooManyBadRows     more rows than the stated share were quarantined
     ├─ LeakError          something of a later time reaches an earlier example
     ├─ NonFiniteLoss      a loss term became NaN or infinite; the batch was saved
     ├─ StorageError       a store could not be read or written, even after retries
     ├─ TakenOver          another process continues the run, so this one stopped
     └─ SkewError          embeddings, index and bundle do not belong together
"""

from __future__ import annotations

from collections.abc import Iterable


class KarmaRayError(Exception):
    """Base class of all errors that are raised on purpose."""


class InputError(KarmaRayError):
    """Wrong user input. The message names the field, the value and the choices.

    >>> str(InputError("--recipe", "karma_txt", choices=["karma_text"]))
    "--recipe: 'karma_txt' is not valid; choices: karma_text"
    >>> str(InputError("--items", None, "is needed: the table of items"))
    '--items is needed: the table of items'
    """

    def __init__(
        self,
        field: str,
        value: object,
        problem: str = "is not valid",
        choices: Iterable[object] | None = None,
    ) -> None:
        lacking = value is None and problem.startswith("is needed")
        message = f"{field} {problem}" if lacking else f"{field}: {value!r} {problem}"
        if choices is not None:
            message += "; choices: " + ", ".join(str(choice) for choice in choices)
        super().__init__(message)
        self.field, self.value, self.problem = field, value, problem
        self._parts = (field, value, problem, None if choices is None else list(choices))

    def __reduce__(self) -> tuple[type[InputError], tuple[object, ...]]:
        """Pickle by constructor arguments: these errors cross process borders under Ray."""
        return type(self), self._parts


class TooManyBadRows(KarmaRayError):
    """More rows were quarantined than the allowed share."""


class LeakError(KarmaRayError):
    """Something of a later time, or of the same page, reaches an earlier example."""


class NonFiniteLoss(KarmaRayError):
    """A loss term became NaN or infinite; the message names it and the saved batch."""


class StorageError(KarmaRayError):
    """A store finally failed. The message names what, where and why.

    >>> str(StorageError("final weights", "s3://b/run", "OSError: no route"))
    "final weights: no access to 's3://b/run' (OSError: no route)"
    """

    def __init__(self, field: str, path: str, reason: str) -> None:
        super().__init__(f"{field}: no access to {path!r} ({reason})")
        self.field, self.path, self.reason = field, path, reason

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str, str]]:
        """Pickle by constructor arguments, as InputError."""
        return type(self), (self.field, self.path, self.reason)


class TakenOver(KarmaRayError):
    """Another process has started to continue this run, and two must not write to it."""


class SkewError(KarmaRayError):
    """Embeddings, index and bundle were not made from each other."""
