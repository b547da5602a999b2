"""Real data sets: one file each turns the raw layout into clips. `ADAPTERS` is the list."""

ADAPTERS = {
    "video": "egom2p.datasets.video:VideoFolder",
    "holoassist": "egom2p.datasets.holoassist:HoloAssist",
    "h2o": "egom2p.datasets.h2o:H2O",
    "taco": "egom2p.datasets.taco:Taco",
    "arctic": "egom2p.datasets.arctic:Arctic",
    "egogen": "egom2p.datasets.egogen:EgoGen",
    "hoi4d": "egom2p.datasets.hoi4d:HOI4D",
}
