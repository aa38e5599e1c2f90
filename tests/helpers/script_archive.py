"""TorchScript archives made without PyTorch."""

import collections
import io
import pickle
import sys
import types
import zipfile
from unittest import mock

import numpy as np

KINDS = {"float16": "HalfStorage", "float32": "FloatStorage", "int64": "LongStorage"}


def write(path, tensors, **attributes):
    """Writes a module with these tensors, in modules by the parts of their names."""
    names = "__torch__.clip.model", "torch", "torch._utils", "torch.jit._pickle"
    fakes = {name: types.ModuleType(name) for name in ("__torch__", *names)}
    script, torch, utils, jit = (fakes[name] for name in names)
    stand_in = {"__module__": script.__name__, "__qualname__": "CLIP"}
    kind = script.CLIP = type("CLIP", (), stand_in)
    for name in KINDS.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    utils._rebuild_tensor_v2 = _function("_rebuild_tensor_v2", "torch._utils")
    jit.build_intlist = _function("build_intlist", "torch.jit._pickle")

    class Tensor:
        def __init__(self, key, array):
            self.key, self.array = key, array

        def __reduce__(self):
            strides = tuple(n // self.array.itemsize for n in self.array.strides)
            rest = (False, collections.OrderedDict())
            storage = Storage(self.key, self.array)
            shape = self.array.shape
            return utils._rebuild_tensor_v2, (storage, 0, shape, strides, *rest)

    class Storage:
        def __init__(self, key, array):
            self.key, self.array = key, array

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                storage = getattr(torch, KINDS[obj.array.dtype.name])
                return "storage", storage, obj.key, "cuda:0", obj.array.size
            return None

    class Sizes:  # a list of integers, as TorchScript writes it
        def __reduce__(self):
            return jit.build_intlist, ([7, 7],)

    arrays = [np.ascontiguousarray(array) for array in tensors.values()]
    named = enumerate(zip(tensors, arrays, strict=True))
    items = {name: Tensor(str(key), array) for key, (name, array) in named}
    data = io.BytesIO()
    with mock.patch.dict(sys.modules, fakes):
        attributes = {**items, "sizes": Sizes(), **attributes}
        Pickler(data, 2).dump(_module(kind, attributes))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("clip/data.pkl", data.getvalue())
        archive.writestr("clip/constants.pkl", pickle.dumps((), 2))
        archive.writestr("clip/code/program", "raise SystemExit")
        for key, array in enumerate(arrays):
            archive.writestr(f"clip/data/{key}", array.tobytes())
    return path


def _module(kind, attributes):
    """A module with modules inside, by the parts of the attributes' names."""
    made, inner = kind(), {}
    for name, value in attributes.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            vars(made)[name] = value
    vars(made).update({name: _module(kind, own) for name, own in inner.items()})
    return made


def _function(name, module):
    def function(*_):
        raise AssertionError("it is pickled by name alone")

    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    return function
