"""Built-in scenes with a right and a wrong caption."""

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import SHAPES, captions, decode, scene_records


def scene_choice_records(split: str, size: int = 32, count: int | None = None) -> list[Record]:
    """The first caption of scenes of two objects, and a wrong one: the same objects in the other "order", with each
    other's "colour", or the first one of another "shape", which is the domain. Arguments as for `scene_records`.
    """
    shapes = list(SHAPES)
    records = []
    for record in scene_records(split, size, count):
        scene = decode(int(record.id))
        first, second = scene.things
        next_shape = shapes[(shapes.index(first.shape) + 1) % len(shapes)]
        wrong = {
            "order": (second, first),
            "colour": (first._replace(colour=second.colour), second._replace(colour=first.colour)),
            "shape": (first._replace(shape=next_shape), second),
        }
        for kind, things in wrong.items():
            if things != (first, second):
                wrong_caption = captions(scene._replace(things=things))[0]
                records.append(Record(f"{record.id}/{kind}", record.image, (record.captions[0], wrong_caption), kind))
    return records
