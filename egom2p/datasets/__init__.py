"""Real data sets: one file each turns the raw layout into clips. `ADAPTERS` is the list."""

ADAPTERS = {
    "video": "egom2p.datasets.video:VideoFolder",
    "holoassist": "egom2p.datasets.holoassist:HoloAssist",
    "egoexo4d": "egom2p.datasets.egoexo4d:EgoExo4D",
    "hot3d_aria": "egom2p.datasets.hot3d:HOT3DAria",
    "hot3d_quest": "egom2p.datasets.hot3d:HOT3DQuest",
    "h2o": "egom2p.datasets.h2o:H2O",
    "taco": "egom2p.datasets.taco:Taco",
    "arctic": "egom2p.datasets.arctic:Arctic",
    "egogen": "egom2p.datasets.egogen:EgoGen",
    "hoi4d": "egom2p.datasets.hoi4d:HOI4D",
    "ase": "egom2p.datasets.ase:ASE",
    "adt": "egom2p.datasets.adt:ADT",
}
