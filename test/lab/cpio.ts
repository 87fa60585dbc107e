/** A file of an archive; a mode with file type bits (0o100755, 0o040755, 0o120777; 0o020600 with a device number). */
export type CpioEntry = { name: string; mode: number; content?: Buffer; device?: [major: number, minor: number] }

/** A cpio archive in the "newc" format (SVR4 without checksum), owned by root, without times: what Linux takes as initramfs. */
export const cpioArchive = (entries: readonly CpioEntry[]): Buffer =>
  Buffer.concat([...entries, { name: 'TRAILER!!!', mode: 0 }].map((entry, index) => member(entry, index + 1)))

const member = ({ name, mode, content = Buffer.alloc(0), device = [0, 0] }: CpioEntry, inode: number): Buffer => {
  const nameBytes = Buffer.from(`${name}\0`)
  const fields = [inode, mode, 0, 0, 1, 0, content.length, 0, 0, device[0], device[1], nameBytes.length, 0]
  const header = Buffer.from(`070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`)
  return Buffer.concat([padded(Buffer.concat([header, nameBytes])), padded(content)])
}

const padded = (bytes: Buffer): Buffer => Buffer.concat([bytes, Buffer.alloc((4 - (bytes.length % 4)) % 4)])
