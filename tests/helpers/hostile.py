"""Input that a stranger may have made."""

from pathlib import Path

from helpers.shards import jpeg


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def good(texts: str = "txt", text: bytes = b"a dog") -> dict[str, bytes]:
    """The members of eight samples."""
    pairs = [(f"good{i}", jpeg(i)) for i in range(8)]
    return {name: data for key, image in pairs for name, data in ((f"{key}.jpg", image), (f"{key}.{texts}", text))}
