"""Demo page that answers questions about an image and streams the policy's turns."""
