"""A page on which one asks about a picture and watches the policy search and answer."""
