"""`backlens doctor`: is this model understood, and are its numbers right on this machine?"""
