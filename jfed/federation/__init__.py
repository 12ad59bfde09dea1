"""Federated learning over pytrees: tiers, local training, the engine, the merge, the server."""
