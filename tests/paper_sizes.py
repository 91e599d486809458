"""The paper's models and their numbers of parameters, without the embedding. Nothing of ours is used."""

from __future__ import annotations

# A size's width, heads, width of a head and width of the MLP.
WIDTHS = {
    "40m": (512, 8, 64, 2048),
    "80m": (512, 8, 128, 4096),
    "160m": (1024, 8, 128, 4096),
    "320m": (1024, 16, 128, 8192),
    "650m": (2048, 16, 128, 8192),
    "1300m": (2048, 32, 128, 16384),
}

# By size: 12 ordinary layers and 13, and 12 of which one is recurrent, fixed:skip.
FAMILY = {
    "40m": (37_764_704, 40_911_720, 40_387_192),
    "80m": (75_513_440, 81_806_184, 80_233_080),
    "160m": (151_023_712, 163_608_936, 160_462_968),
    "320m": (302_021_824, 327_190_224, 319_849_712),
    "650m": (604_037_312, 654_373_584, 639_693_040),
    "1300m": (1_208_023_424, 1_308_691_872, 1_277_233_632),
}

# By the size whose widths they have: 24 layers, two of them recurrent (fixed:skip), and 26 ordinary layers.
TALL = {"320m": (639_698_400, 654_379_424), "650m": (1_279_384_032, 1_308_745_120)}

# 12 layers of size 160m, one of them recurrent, by gate and cell.
CELLS = {
    ("fixed", "skip"): 160_462_968,
    ("lstm", "skip"): 164_658_296,
    ("fixed", "dual"): 168_853_624,
    ("fixed", "single"): 170_948_728,
    ("lstm", "single"): 179_338_360,
    ("lstm", "dual"): 181_438_584,
}

# What feedback adds to any of them, in each of eleven layers: a query for the state, rows of the output projection for
# what it finds, and a scale for each head.
FEEDBACK = 23_068_760
