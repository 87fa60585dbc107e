import { readFile } from 'node:fs/promises'

/** Names this boot of the machine: what only memory holds is gone with it. Undefined if the kernel does not say. */
export const readBootId = async (): Promise<string | undefined> => (await readFile('/proc/sys/kernel/random/boot_id', 'utf8').catch(() => '')).trim() || undefined
