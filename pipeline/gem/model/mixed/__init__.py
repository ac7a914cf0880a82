"""A linear mixed model of log-CPM on metadata, whose prediction is blended with the network's."""
