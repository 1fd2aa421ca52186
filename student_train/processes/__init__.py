"""The processes of one run: who they are, what they agree on, and the model that they share."""
