"""Oracle, fakes and contracts, for our tests and for those of plugin authors."""
