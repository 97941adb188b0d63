"""Hosts: the toolkits that run our methods. Nothing outside this room imports one."""
