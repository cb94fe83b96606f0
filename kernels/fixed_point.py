"""How the sampling ops count probability: in integers, whose sums do not depend on their order."""

MASS_BITS = 38  # a token's mass is at most 2^38, so that 2^24 tokens stay below 2^63
UNIFORM_BITS = 24  # of a uniform number: what float32 holds exactly
