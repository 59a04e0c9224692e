"""Training: from a configuration to a folder of weights. loop.train is the way in; CONTRIBUTING walks through the files."""
