"""What Metal refuses and a C++ compiler accepts, found in its tokens."""

import re

WORDS = {
    "double": "Metal has no double",
    "goto": "Metal has no goto",
    "new": "Metal has no new",
    "delete": "Metal has no delete",
    "try": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "virtual": "Metal has no virtual functions",
    "dynamic_cast": "Metal has no run-time type information",
    "typeid": "Metal has no run-time type information",
    "thread_local": "Metal has no thread_local",
    "std": "Metal has no namespace std",
}
STRING_OR_LINE_MARKER = re.compile(r'^#[^\n]*|"(?:\\.|[^"\\\n])*"', re.MULTILINE)
# A [ that starts an expression, with what follows a capture list.
LAMBDA = re.compile(r"(?<![\w\])\[])\s*\[[\w\s&=,*]*\]\s*(?:\([^()]*\)\s*)?(?:->\s*\w+\s*)?\{")
UNSUFFIXED = re.compile(r"(?<![\w.])(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?(?![\w.])")
PLAIN = r"[^;{}()]*"
FUNCTION = re.compile(rf"\b(\w+)\s*\({PLAIN}(?:\({PLAIN}\){PLAIN})*\)\s*(?:const\s*)?\{{")
STATEMENTS = {"if", "for", "while", "switch", "return", "sizeof", "decltype"}
ATTRIBUTE = re.compile(r"\[\[.*?\]\]", re.DOTALL)


def blank(match):
    return re.sub(r"[^\n]", " ", match[0])


def body_end(text, start):
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text)


def calls(text):
    """Every function with the names called in its body."""
    graph = {}
    for function in FUNCTION.finditer(text):
        if function[1] not in STATEMENTS:
            body = text[function.end() : body_end(text, function.end() - 1)]
            called = re.findall(r"\b(\w+)\s*(?:<[^;(){}]*>)?\s*\(", body)
            graph.setdefault(function[1], set()).update(called)
    return graph


def recursive(graph):
    """The functions that call themselves, at once or through others.

    Overloads share a name: one that calls another counts, so give them different names.
    """

    def reaches(name, goal, seen):
        for called in graph.get(name, ()):
            if called == goal:
                return True
            if called not in seen:
                seen.add(called)
                if reaches(called, goal, seen):
                    return True
        return False

    return sorted(name for name in graph if reaches(name, name, set()))


def lint(text):
    """A list of complaints about a preprocessed Metal source, empty if there is none."""
    found = []
    text = STRING_OR_LINE_MARKER.sub(blank, text)
    text = ATTRIBUTE.sub(blank, text)

    def complain(position, complaint):
        line = text[text.rfind("\n", 0, position) + 1 :].split("\n", 1)[0]
        found.append((position, f"{complaint}: {line.strip()}"))

    for word in re.finditer(r"\b[a-z_]+\b", text):
        if word[0] in WORDS:
            complain(word.start(), WORDS[word[0]])
    for match in LAMBDA.finditer(text):
        complain(match.start(), "Metal before 3.2 has no lambdas")
    for match in UNSUFFIXED.finditer(text):
        complain(match.start(), f"{match[0]} would be a double in C++, so write f")
    for name in recursive(calls(text)):
        complain(text.index(name), f"Metal has no recursion, and {name} calls itself")
    return [complaint for _, complaint in sorted(found)]
