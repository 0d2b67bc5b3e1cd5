"""The search for the best sub-network, on the fly, in idle time and offline alike."""
