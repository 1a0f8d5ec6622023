"""The page for everybody, as a Space of the Hugging Face Hub: copy this file there as app.py, beside the wheel and a
requirements.txt with the line `./WHEEL[demo]`. The Space's variable MODEL names the model, as `checkpoint=` does.
"""

import os

import coca_lit
from coca_lit.tools.demo.page import LOOK, build_page

name = os.environ.get("MODEL", "coca_ViT-B-32")
build_page(coca_lit.load_model(name), name, index=None).launch(**LOOK)
