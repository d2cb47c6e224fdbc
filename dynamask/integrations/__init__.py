"""What other libraries load: each module here needs the library that it is named after."""
