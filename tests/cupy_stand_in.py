"""A stand-in for CuPy on machines without a GPU: arrays that refuse to mix with NumPy's.

As `sys.modules["cupy"]` it lets phi3_ref's CuPy path run on the host, and fail here where it would
fail at the user's: an `ndarray` wraps a NumPy array ("device memory") that only `asarray` leads
into and only `get` leads out of. It knows the functions that phi3_ref may call, and no more, with
CuPy 14's own restrictions: what is not an array has no place in `where`'s condition, a batched
bfloat16 product fails, `argsort` is stable or nothing. `add.reduceat` is missing: CuPy's subtracts
sums from the first element on, so that a result has the rounding errors of all before it.
`transfers` lists the bytes of every copy to the host, those behind `bool()`, `int()` and `float()`
included.

While a stream captures, nothing is computed: results are poison until the graph is launched, which
computes, with the same arguments and into the same memory, what was asked for. Copies from and to
the host are errors then, and so are matrix products, which CuPy does not record.
"""

import contextlib
import types

import ml_dtypes
import numpy as np

__version__ = "14.0.0"
transfers = []
recorded = None  # while a stream captures: what the graph is to do


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array in "device memory". Operators come from the mixin, by way of `__array_ufunc__`."""

    def __init__(self, host):
        self._host = host
        self.device = "stand-in"

    def get(self):
        refuse_while_capturing()
        transfers.append(self._host.nbytes)
        return self._host.copy()

    # What CuPy refuses.

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. "
                        "Please use `.get()` to construct a NumPy array explicitly.")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method != "__call__":
            raise TypeError(f"CuPy has no {ufunc.__name__}.{method}")
        if ufunc is np.matmul:
            return matmul(*inputs, **kwargs)
        return on_device(ufunc)(*inputs, **kwargs)

    def __array_function__(self, function, kinds, args, kwargs):
        ours = globals().get(function.__name__)
        if ours is None or any(kind is not ndarray for kind in kinds):
            raise TypeError(f"np.{function.__name__} cannot take {kinds}")
        return ours(*args, **kwargs)

    # Elements. A basic slice is a view, as in NumPy and CuPy.

    def __getitem__(self, key):
        return on_device(lambda host, *_: host[index(key)])(self, key)

    def __setitem__(self, key, value):
        value = unwrap(value)
        do(lambda: self._host.__setitem__(index(key), value))

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __len__(self):
        return len(self._host)

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())


for name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides", "flags"):
    setattr(ndarray, name, property(lambda self, name=name: getattr(self._host, name)))


def unwrap(value):
    """Return what the host computes with: arrays of ours opened, Python's and NumPy's scalars."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(unwrap, value))
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}: a NumPy array among CuPy's")
    return value._host if isinstance(value, ndarray) else value


def index(key):
    """Return the host's index for one of CuPy's: integers, slices, and arrays of ours."""
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, (np.ndarray, list)):
            raise TypeError(f"an index of type {type(part)} would be copied to the device")
    return unwrap(key)


def on_device(function):
    """Return `function`, one of NumPy's, for arrays of ours; the result is always an array."""
    def call(*args, **kwargs):
        out = kwargs.get("out")  # operators such as += pass a tuple of one
        args, kwargs = unwrap(args), {name: unwrap(kwargs[name]) for name in kwargs}
        if out is not None:
            do(lambda: function(*args, **kwargs))
            return out[0] if isinstance(out, tuple) else out
        result = function(*args, **kwargs)
        if isinstance(result, tuple):  # a derivative's arrays: no graph needs them
            refuse_while_capturing()
            return tuple(ndarray(np.asarray(part)) for part in result)
        host = np.asarray(result)
        hosts = [a for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)]
        if recorded is not None and not any(np.may_share_memory(host, a) for a in hosts):
            host = np.array(host)
            host[...] = poison(host.dtype)
            do(lambda: np.copyto(host, function(*args, **kwargs)))
        return ndarray(host)
    return call


def do(action):
    """Do it, or note it for the graph that is being captured."""
    if recorded is None:
        action()
    else:
        recorded.append(action)


def refuse_while_capturing():
    if recorded is not None:
        raise cuda.runtime.CUDARuntimeError("cudaErrorStreamCaptureUnsupported")


def poison(dtype):
    """What memory holds that nobody wrote: NaN, or a number that no index should be."""
    return {"b": True, "i": -(2**30), "u": 255}.get(np.dtype(dtype).kind, np.nan)


for name in ("all", "any", "argmax", "astype", "copy", "cumsum", "max", "mean", "min", "ravel",
             "repeat", "reshape", "squeeze", "sum", "swapaxes", "transpose", "view"):
    setattr(ndarray, name, on_device(getattr(np.ndarray, name)))
ndarray.T = property(ndarray.transpose)

for name in ("arange", "broadcast_to", "concatenate", "cos", "divide", "empty_like", "exp",
             "full", "isfinite", "log", "maximum", "moveaxis", "ones", "sin", "sqrt", "stack",
             "take_along_axis", "vdot", "zeros_like"):
    globals()[name] = on_device(getattr(np, name))


def asarray(a, dtype=None):
    """Copy `a` to the device, unless it is there: the one way in."""
    if isinstance(a, ndarray):
        return a if dtype is None else a.astype(dtype, copy=False)
    refuse_while_capturing()
    return ndarray(np.array(a, dtype))


def empty(shape, dtype=float):
    return allocated(np.full(shape, poison(dtype), dtype))


def zeros(shape, dtype=float):
    return allocated(np.zeros(shape, dtype))


def allocated(host):
    """Return a new array, or CuPy's error where `MEMORY` has no place for it."""
    if host.nbytes > MEMORY[0] + POOL.free_bytes():
        raise cuda.memory.OutOfMemoryError(
            f"Out of memory allocating {host.nbytes:,} bytes (allocated so far: 0 bytes).")
    return ndarray(host)


def where(condition, x, y):
    return on_device(np.where)(condition.astype(bool, copy=False), x, y)  # CuPy's own first step


def copyto(dst, src, casting="same_kind", where=None):
    dst, src, where = unwrap(dst), unwrap(src), unwrap(where)
    do(lambda: np.copyto(dst, src, casting=casting, where=where))


def argsort(a, axis=-1, kind=None):
    if kind not in (None, "stable"):
        raise ValueError(f"kind={kind!r}: CuPy sorts stably")
    return on_device(np.argsort)(a, axis=axis, kind="stable")


def unique(ar, return_inverse=False):
    """The distinct elements; the host reads how many there are."""
    refuse_while_capturing()
    transfers.append(8)
    found = np.unique(unwrap(ar), return_inverse=return_inverse)
    return tuple(map(ndarray, found)) if return_inverse else ndarray(found)


def nonzero(a):
    """Where the elements are not zero; the host reads how many there are."""
    refuse_while_capturing()
    transfers.append(8)
    return tuple(map(ndarray, np.nonzero(unwrap(a))))


def matmul(a, b):
    """Multiply in the arrays' dtype, in 16 bits summed in float32 and rounded once."""
    if recorded is not None:
        raise NotImplementedError("calling cuBLAS API during stream capture is unsupported")
    a, b = unwrap(a), unwrap(b)
    dtype = np.result_type(a, b)
    if dtype == ml_dtypes.bfloat16 and max(a.ndim, b.ndim) > 2:
        raise TypeError("CuPy 14 has no batched bfloat16 matmul")
    sums = np.float32 if dtype.itemsize == 2 else dtype
    product = a.astype(sums, copy=False) @ b.astype(sums, copy=False)
    return ndarray(np.asarray(product.astype(dtype, copy=False)))


def default_rng(seed=None):
    """NumPy's random numbers, not CuPy's, so that results can be compared."""
    return types.SimpleNamespace(random=on_device(np.random.default_rng(seed).random))


class Stream:
    """Streams that capture; and the graphs that come of it."""

    def __init__(self, non_blocking=False):
        self.non_blocking = non_blocking

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def synchronize(self):
        refuse_while_capturing()

    def begin_capture(self):
        global recorded
        assert self.non_blocking and recorded is None
        recorded = []

    def end_capture(self):
        global recorded
        actions, recorded = recorded, None
        return types.SimpleNamespace(launch=lambda: [action() for action in actions])


def get_default_memory_pool():
    return POOL


random = types.SimpleNamespace(default_rng=default_rng)
MEMORY = [2**33, 2**34]  # bytes: free, of all
POOL = types.SimpleNamespace(free_bytes=lambda: 2**10)  # what freed arrays left
cuda = types.SimpleNamespace(
    Stream=Stream, get_current_stream=Stream,
    MemoryPool=lambda: types.SimpleNamespace(malloc=None),
    using_allocator=lambda allocator: contextlib.nullcontext(),
    Device=lambda: types.SimpleNamespace(mem_info=MEMORY),
    memory=types.SimpleNamespace(OutOfMemoryError=type("OutOfMemoryError", (MemoryError,), {})),
    runtime=types.SimpleNamespace(
        CUDARuntimeError=type("CUDARuntimeError", (RuntimeError,), {}),
        getDeviceCount=lambda: 1, memGetInfo=lambda: MEMORY,
        driverGetVersion=lambda: 13010, runtimeGetVersion=lambda: 13020,
    ),
)
