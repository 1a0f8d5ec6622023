"""The 15 CoCas and 15 MaMMUTs of LAION's scaling study, as its profile publishes them.

Source: `model_profile.csv` of LAION-AI/scaling-laws-for-comparison at commit 5343917.
"""

from typing import NamedTuple

from coca_lit.models import CoCa


class Profile(NamedTuple):
    parameters: float  # millions
    image: float
    text: float
    gflops: float  # of a pair of image and text, see `tests/tools/plan/test_study_flops.py`


PROFILE = {
    "coca_ViT-B-14": Profile(251.81, 87.42, 63.43, 73.57),
    "coca_ViT-B-16": Profile(420.68, 88.95, 123.65, 97.2),
    "coca_ViT-B-32": Profile(253.56, 89.16, 63.43, 38.08),
    "coca_ViT-H-14": Profile(1646.1, 636.8, 354.03, 535.51),
    "coca_ViT-H-16": Profile(1646.25, 636.96, 354.03, 459.7),
    "coca_ViT-H-32": Profile(1649.02, 639.72, 354.03, 273.96),
    "coca_ViT-L-14": Profile(638.45, 306.72, 123.65, 219.38),
    "coca_ViT-L-16": Profile(638.57, 306.85, 123.65, 182.95),
    "coca_ViT-L-32": Profile(640.78, 309.06, 123.65, 93.7),
    "coca_ViT-M-14": Profile(204.11, 39.71, 63.43, 49.11),
    "coca_ViT-M-16": Profile(204.17, 39.77, 63.43, 44.51),
    "coca_ViT-M-32": Profile(205.27, 40.88, 63.43, 33.26),
    "coca_ViT-S-14": Profile(124.47, 22.46, 40.44, 28.36),
    "coca_ViT-S-16": Profile(124.52, 22.5, 40.44, 25.78),
    "coca_ViT-S-32": Profile(125.35, 23.33, 40.44, 19.45),
    "mammut_ViT-B-14": Profile(181.27, 86.1, 94.78, 63.54),
    "mammut_ViT-B-16": Profile(290.52, 86.39, 203.54, 79.7),
    "mammut_ViT-B-32": Profile(183.02, 87.85, 94.78, 26.91),
    "mammut_ViT-H-14": Profile(1188.14, 632.08, 554.76, 464.39),
    "mammut_ViT-H-16": Profile(1188.3, 632.23, 554.76, 385.72),
    "mammut_ViT-H-32": Profile(1191.06, 634.99, 554.76, 192.97),
    "mammut_ViT-L-14": Profile(508.29, 303.97, 203.54, 202.56),
    "mammut_ViT-L-16": Profile(508.42, 304.09, 203.54, 165.37),
    "mammut_ViT-L-32": Profile(510.63, 306.3, 203.54, 74.28),
    "mammut_ViT-M-14": Profile(133.57, 38.53, 94.78, 39.14),
    "mammut_ViT-M-16": Profile(133.63, 38.59, 94.78, 34.2),
    "mammut_ViT-M-32": Profile(134.73, 39.69, 94.78, 22.1),
    "mammut_ViT-S-14": Profile(84.74, 21.77, 62.83, 23.5),
    "mammut_ViT-S-16": Profile(84.79, 21.81, 62.83, 20.72),
    "mammut_ViT-S-32": Profile(85.62, 22.64, 62.83, 13.91),
}
SMALL = ("coca_ViT-S-32", "mammut_ViT-S-32")
# All widths, and of one all sizes of patches, which change the number of patches alone; texts of B/16 are wider.
SIZES = [name for name in PROFILE if name.endswith("-32") or "-S-" in name or "-B-16" in name]


def millions(model: CoCa) -> tuple[float, float, float]:
    """Parameters as in the profile: all, of the image tower with its pooler, of the text tower. A MaMMUT's text tower
    has its cross blocks and vocabulary; the matrix between the towers belongs to neither.
    """
    two_pass = model.config.pooler.startswith("mean")
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    image = sum(parts[name] for name in ("image_encoder", "pooling", "image_projection"))
    if two_pass:
        image -= model.pooling.to_text.weight.numel()
    text = parts["text"] + (parts["decoder"] if two_pass else 0)
    whole = sum(p.numel() for p in model.parameters())
    return whole / 1e6, image / 1e6, text / 1e6
