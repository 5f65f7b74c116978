"""The layers of a Mixtral transformer, parallel by construction."""
