"""How the weights of a fit change: AdamW, its schedule, and the precision of products."""
