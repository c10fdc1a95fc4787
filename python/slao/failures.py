"""What a user, a disk or a machine can bring about, as one line; anything else is a fault of this library."""

from __future__ import annotations

import errno

_ADVICE = {
    errno.ENOSPC: "free some space, then continue a run with --resume",
    errno.EDQUOT: "free some space, then continue a run with --resume",
    errno.EFBIG: "a limit on the size of files was met: raise it (ulimit -f), then continue a run with --resume",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file stands where a folder is expected: choose another place",
    errno.EEXIST: "something stands there already: choose another place",
    errno.EISDIR: "a folder stands where a file is expected",
    errno.EACCES: "change the permissions, or choose another place",
    errno.EPERM: "change the permissions, or choose another place",
    errno.EROFS: "the disk is read-only: choose another place",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
}
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate", "CUBLAS_STATUS_ALLOC")


def explain(error: Exception) -> str | None:
    """The line for an error that ends a command; None for one that nobody but us can mend."""
    from safetensors import SafetensorError

    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename is not None else ""
        said = f"{place}{error.strerror}" if error.strerror else str(error)
        advice = _ADVICE.get(error.errno)
        return f"{said}; {advice}" if advice else said
    if isinstance(error, ValueError | ImportError | OSError | SafetensorError):
        return " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in _MEMORY)):
        return f"the memory is full ({_first(error)}): lower train.batch_size, train.eval_batch_size or --jobs"
    return None


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
