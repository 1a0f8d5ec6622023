"""A newcomer's first hour, with the installed commands against a small Hub on the loopback interface that serves random
weights of a small CoCa under the released names: caption a photo, finetune, evaluate, push, pull, compare.

    PYTHONPATH=…/tests python …/.ci/hub_walk.py    in an empty folder, with the Python that has coca_lit
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.hub_server import TOKEN, Hub, Repository

CAPTIONER = "mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k"
SIZES = {
    "image_encoder_args": {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
    **{"image_size": 32, "embed_dim": 32, "pooler_queries": 3, "text_width": 32, "text_heads": 2, "text_layers": 1},
    **{"decoder_layers": 1, "cls_mask": "legacy"},
}
CONFIGURED = ("image_size", "cls_mask")  # keys that conf/model/coca.yaml has, so that they need no +


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([Path(sys.executable).with_name(name), *arguments], capture_output=True, text=True)
    print(f"$ {name} {' '.join(arguments)}\n{done.stdout}{done.stderr}", flush=True)
    assert done.returncode == 0, name
    return done


def main() -> None:
    with Hub() as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(Path("hf").resolve()), "HF_TOKEN": TOKEN}
        os.environ["HF_HUB_DISABLE_XET"] = "1"  # the Hub's second protocol, in a library of its own
        import torch
        from PIL import Image

        from coca_lit import create_model, load_model
        from coca_lit.tools.export import push_to_hub
        from coca_lit.tools.export.open_clip import write_open_clip

        torch.manual_seed(0)
        released = Path("released")
        released.mkdir()
        write_open_clip(create_model("coca_ViT-B-32", **SIZES), released)
        files = {file.name: file.read_bytes() for file in released.iterdir()}
        hub.repositories[f"laion/{CAPTIONER}"] = Repository(files)
        Image.effect_noise((90, 60), 80).convert("RGB").save("photo.jpg")

        done = command("coca-caption", "photo.jpg")
        assert done.stdout.startswith("photo.jpg\t"), done.stdout
        assert "no checkpoint given: this is coca_ViT-L-14/mscoco_finetuned" in done.stderr
        assert str(Path("hf").resolve()) in done.stderr

        sizes = [f"+model.net.{key}={value}".replace("'", "") for key, value in SIZES.items() if key not in CONFIGURED]
        start = ["init_from=coca_ViT-L-14", "model.contrastive_weight=0", "model.net.cls_mask=legacy", "image_size=32"]
        where = ["data=scenes", "trainer=smoke", "name=mine"]
        command("coca-train", "experiment=finetune_mscoco", *where, *start, *sizes)
        command(
            "coca-evaluate", "checkpoint=outputs/mine", "evals=[scenes_captions]", "scoring.images=8", "name=scored"
        )
        assert "scenes/CIDEr" in json.loads(Path("outputs/scored/results.json").read_text())

        command("coca-export", "checkpoint=outputs/mine", "format=open_clip", "output=exports/mine", "push_to=me/mine")
        pushed = hub.repositories["me/mine"].files
        assert {"README.md", "open_clip_config.json", "open_clip_model.safetensors"} < pushed.keys(), pushed.keys()
        pulled, trained, before = load_model("hf-hub:me/mine"), load_model("outputs/mine"), load_model("coca_ViT-L-14")
        torch.testing.assert_close(pulled.state_dict(), trained.state_dict(), rtol=0, atol=0)
        assert pulled.config.cls_mask == before.config.cls_mask == "legacy"
        changed = [name for name, t in trained.state_dict().items() if not torch.equal(t, before.state_dict()[name])]
        assert any(name.startswith("decoder.") for name in changed)
        push_to_hub(pulled, "me/again")
        again = load_model("hf-hub:me/again")
        torch.testing.assert_close(again.state_dict(), trained.state_dict(), rtol=0, atol=0)
    print("a released model was captioned with, finetuned, scored, pushed and pulled")


if __name__ == "__main__":
    main()
