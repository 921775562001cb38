"""Networks: the CausalFusion transformer and the classifier that gives features for scoring."""
