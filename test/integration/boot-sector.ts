// A guest of 512 bytes: a boot sector that writes through the firmware's driver, and so through the real device, its iothread
// and the guest's own counters. Put it at the start of the first disk before QEMU starts; QEMU boots it by `bootindex`.

const bufferAt = 0x8000
const packetAt = 0x7d00
const lbaAt = packetAt + 8
export const bootWriteBytes = 4096
const bootWriteSectors = bootWriteBytes / 512

/** `writes` writes of 4 KiB from `startLba` on, one after the other, each with another content, in each boot too; then the processor halts. 0: for ever, over 64 MiB. */
export const bootSector = ({ startLba = 2048, writes = 0 }: { startLba?: number; writes?: number }): Buffer => {
  const word = (value: number): number[] => [value & 0xff, (value >> 8) & 0xff]
  const double = (value: number): number[] => [...word(value & 0xffff), ...word(value >>> 16)]
  const endLba = startLba + (writes === 0 ? (64 * 1024 * 1024) / 512 : writes * bootWriteSectors)
  const setup = [
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, ...word(0x7c00), // xor ax,ax; ds = es = ss = 0; sp = 7c00
    0x0f, 0x31, 0x66, 0xa3, ...word(bufferAt + 4),                          // rdtsc; mov [buffer + 4], eax
    0x66, 0xc7, 0x06, ...word(lbaAt), ...double(startLba),                  // mov dword [lba], start
  ]
  const loop = [
    0x66, 0xff, 0x06, ...word(bufferAt),                                    // inc dword [buffer]
    0xbe, ...word(packetAt), 0xb8, ...word(0x4300), 0xb2, 0x80, 0xcd, 0x13, // mov si,packet; mov ax,4300; mov dl,80; int 13
    0x66, 0x81, 0x06, ...word(lbaAt), ...double(bootWriteSectors),          // add dword [lba], 8
    0x66, 0x81, 0x3e, ...word(lbaAt), ...double(endLba),                    // cmp dword [lba], end
  ]
  const back = (distance: number): number => 256 - distance
  const again = [0x72, back(loop.length + 2)]                               // jb loop
  const end = writes === 0
    ? [0xeb, back(loop.length + again.length + 2 + 9)]                        // jmp to "mov dword [lba], start"
    : [0xfa, 0xf4, 0xeb, back(3)]                                           // cli; hlt; jmp hlt
  const sector = Buffer.alloc(512)
  Buffer.from([...setup, ...loop, ...again, ...end]).copy(sector)
  Buffer.from([0x10, 0, ...word(bootWriteSectors), ...word(bufferAt), 0, 0, ...double(startLba), 0, 0, 0, 0]).copy(sector, packetAt - 0x7c00)
  sector.writeUInt16LE(0xaa55, 510)
  return sector
}
