"""Pictures drawn from numbers that the library computes: one file a subject, one function a picture."""
