//! Bytes of one connection to gdb: reads by the buffer, writes by the packet. It refuses to know packets.

use std::io;
use std::os::fd::OwnedFd;

use gdbstub::conn::{Connection, ConnectionExt};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

const BUFFER_BYTES: usize = 4096;

/// A connection.
pub struct Wire {
    socket: OwnedFd,
    read: [u8; BUFFER_BYTES],
    at: usize,
    end: usize,
    unsent: Vec<u8>,
}

impl Wire {
    /// Around a connected socket that waits.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, read: [0; BUFFER_BYTES], at: 0, end: 0, unsent: Vec::new() }
    }

    /// True if a byte has come, or the connection has ended: a read does not wait.
    pub fn has_come(&mut self) -> bool {
        if self.at < self.end {
            return true;
        }
        let mut byte = [0];
        // A socket that cannot be asked is broken, and the read says how.
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        !matches!(rustix::net::recv(&self.socket, &mut byte[..], flags), Err(Errno::AGAIN | Errno::INTR))
    }
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.unsent.push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.unsent.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.unsent.len() {
            match rustix::net::send(&self.socket, &self.unsent[sent..], SendFlags::NOSIGNAL) {
                Ok(bytes) => sent += bytes,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.unsent.clear();
        Ok(())
    }
}

impl ConnectionExt for Wire {
    fn read(&mut self) -> io::Result<u8> {
        if self.at == self.end {
            self.flush()?;
            self.end = loop {
                match rustix::net::recv(&self.socket, &mut self.read[..], RecvFlags::empty()) {
                    Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok((bytes, _)) => break bytes,
                    Err(Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            };
            self.at = 0;
        }
        self.at += 1;
        Ok(self.read[self.at - 1])
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        if !self.has_come() {
            return Ok(None);
        }
        let byte = self.read()?;
        self.at -= 1;
        Ok(Some(byte))
    }
}
