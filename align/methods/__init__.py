"""The methods as functions of log-probabilities and scores: shipped losses, and the calls of the user's own.

``records.py`` has what the functions get, ``losses.py`` the shipped losses, ``call.py`` the calls,
``contract.py`` the properties that an own function must have.
"""
