"""What Triton's interpreter does again and again to no effect, done once: half of its time."""

from __future__ import annotations


def hasten() -> None:
    """Change nothing of what the interpreter computes or checks. Of Triton itself it uses what is not documented."""
    from triton import language as tl
    from triton.runtime import interpreter

    # Additions are made in 64 bits too, to assert that nothing overflows, by an assert that only `debug` enables.
    assert not interpreter.interpreter_builder.options.debug
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    # A table is built to look one type up.
    look_up, types = interpreter._get_np_dtype, {}

    def numpy_type(dtype):
        if dtype.name not in types:
            types[dtype.name] = look_up(dtype)
        return types[dtype.name]

    interpreter._get_np_dtype = numpy_type

    # Each call of a function from a kernel puts the interpreter's functions in the language's place, although the
    # kernel's launch has done so, and takes them away in its end.
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        if tl.core.is_builtin(tl.tensor.__add__):  # a launch begins
            patched.clear()
        elif id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch(function)

    interpreter._patch_lang = patch_once
