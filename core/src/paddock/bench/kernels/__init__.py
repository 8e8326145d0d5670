"""How near each op and each attention backend comes to what the device can do, beside its twin and torch's own."""
