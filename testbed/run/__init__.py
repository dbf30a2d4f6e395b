"""An experiment carried out, over emulated links or in virtual time."""
