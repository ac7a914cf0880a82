"""GEM and every simple predictor on real cohorts, one held-out condition at a time."""
