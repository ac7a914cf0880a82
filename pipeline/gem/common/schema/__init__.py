"""What the models of params.yaml are made of."""
