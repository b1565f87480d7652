"""Metal Shading Language to C++: the words that C++ compilers do not know.

Works on preprocessed text, so that macros may make kernels. What changes:

- attributes in [[ ]] vanish, after their meaning was read off;
- function constants become variables that can be set;
- threadgroup arrays in a kernel's body move to memory that the scheduler keeps;
- the constructors metal::float4(...) become metal::make<metal::float4>(...);
- every kernel gets a launcher, which fetches its arguments from the scheduler.
"""

import re
from typing import NamedTuple

BUILTINS = {
    "thread_position_in_grid",
    "threads_per_grid",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_threadgroup",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
}

KERNEL = re.compile(r"\[\[\s*kernel\s*\]\]\s*void\s+(\w+)\s*\(")
INSTANTIATION = re.compile(
    r'template\s*\[\[\s*host_name\s*\(\s*"(?P<name>\w+)"\s*\)\s*\]\]\s*\[\[\s*kernel\s*\]\]\s*'
    r"decltype\s*\((?P<call>(?P<function>\w+)\s*<[^;()]*>)\)[^;]*;"
)
FUNCTION_CONSTANT = re.compile(
    r"\bconstant\s+(?P<type>bool|int)\s+(?P<name>\w+)\s*"
    r"\[\[\s*function_constant\s*\(\s*(?P<index>\d+)\s*\)\s*\]\]\s*;"
)
THREADGROUP_ARRAY = re.compile(
    r"(?<=[;{}])(?P<space>\s*)threadgroup\s+(?P<type>[\w:]+)\s+(?P<name>\w+)\s*"
    r"(?P<size>(?:\[[^\]]*\])+)\s*;"
)
ATTRIBUTE = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
VECTOR_CONSTRUCTOR = re.compile(r"\bmetal::((?:float|half|int|uint|ulong)[234])\s*\(")


class MslError(Exception):
    """The source is none that Metal would accept."""


class Translation(NamedTuple):
    code: str
    kernels: list[str]  # host names, in the order of their launchers
    constants: dict[str, str]  # function constants: name to type


def closing(text, start, opening, close):
    """The position of the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] == opening:
            depth += 1
        elif text[at] == close:
            depth -= 1
            if depth == 0:
                return at
    raise MslError(f"unbalanced {opening}")


def split_arguments(text):
    """At the commas outside all brackets."""
    parts, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        if character in "([{<":
            depth += 1
        elif character in ")]}>":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]]


def binding(kernel, parameter):
    """The C++ expression that fetches the argument for a kernel's parameter."""
    attributes = [
        attribute.strip()
        for group in ATTRIBUTE.findall(parameter)
        for attribute in split_arguments(group)
    ]
    declaration = " ".join(ATTRIBUTE.sub("", parameter).split())
    for attribute in attributes:
        if buffer := re.fullmatch(r"buffer\s*\(\s*(\d+)\s*\)", attribute):
            if not re.search(r"\b(device|constant)\b", declaration):
                raise MslError(f"{kernel}: {declaration}: a buffer is in device or constant")
            fetch = "reference" if "&" in declaration else "pointer"
            return f"msl::{fetch}({buffer[1]})"
        if attribute in BUILTINS:
            return f"msl::{attribute}()"
    raise MslError(f"{kernel}: {declaration}: no attribute that binds it, of {attributes}")


def translate(text):
    """C++ for a preprocessed Metal source, with the names that its kernels are run by."""
    bindings, plain = {}, []
    for kernel in KERNEL.finditer(text):
        name, opening = kernel[1], kernel.end() - 1
        end = closing(text, opening, "(", ")")
        bindings[name] = [binding(name, p) for p in split_arguments(text[opening + 1 : end])]
        if not re.search(r"template\s*<[^;{}]*>\s*$", text[: kernel.start()]):
            plain.append((closing(text, text.index("{", end), "{", "}"), name))

    names = []

    def launcher(name, function, call):
        number = len(names)
        names.append(name)
        arguments = ", ".join(bindings[function])
        return f'extern "C" void msl_launcher_{number}() {{ {call}({arguments}); }}'

    # From the end, so that the earlier positions stay right.
    for end, name in reversed(plain):
        text = text[: end + 1] + launcher(name, name, name) + text[end + 1 :]
    text = INSTANTIATION.sub(lambda m: launcher(m["name"], m["function"], m["call"]), text)
    if len(set(names)) != len(names):
        raise MslError(f"two kernels of one name among {names}")

    text = THREADGROUP_ARRAY.sub(
        r"\g<space>threadgroup \g<type> (&\g<name>)\g<size> = "
        r"*(threadgroup \g<type>(*)\g<size>)"
        r"msl::threadgroup_memory(__COUNTER__, sizeof(\g<type>\g<size>));",
        text,
    )

    constants = {m["name"]: m["type"] for m in FUNCTION_CONSTANT.finditer(text)}
    text = FUNCTION_CONSTANT.sub(lambda m: f"MSL_CONSTANT({m['type']}, {m['name']})", text)
    text = ATTRIBUTE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    text = VECTOR_CONSTRUCTOR.sub(r"metal::make<metal::\1>(", text)

    declarations = "".join(
        f'extern "C" void msl_launcher_{number}();\n' for number in range(len(names))
    )
    table = ", ".join(f"msl_launcher_{number}" for number in range(len(names)))
    code = f"""#include <metal_stdlib>
#ifdef MSL_STRICT
#define MSL_CONSTANT(type, name) extern constant type name;
#else
#define MSL_CONSTANT(type, name) extern "C" type name; type name;
#endif
{text}
{declarations}
extern "C" void (*const msl_launchers[])();
void (*const msl_launchers[])() = {{{table}}};
"""
    return Translation(code, names, constants)
