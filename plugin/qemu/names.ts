/** Everything we make in a QEMU begins with this; nothing else may be touched. */
export const ourPrefix = 'cdp-'

export const isOurs = (name: string): boolean => name.startsWith(ourPrefix)

/** Names of what is made for the disk `key` ('scsi0'). Deterministic, so that a half state can be read from QEMU alone. */
export type DiskNames = {
  job: string
  /** NBD client node: where the mirror job writes to. */
  target: string
  /** The mirror job's filter: made and removed by the job. */
  filter: string
  /** Raw node above the filter (8.4). */
  shield: string
  /** Block export id and NBD export name of the read-only export. */
  readExport: string
}

export const namesOf = (key: string): DiskNames => ({
  job: `cdp-job-${key}`,
  target: `cdp-target-${key}`,
  filter: `cdp-filter-${key}`,
  shield: `cdp-shield-${key}`,
  readExport: `cdp-read-${key}`,
})

/** The disk that a job, node or export of ours belongs to: 'cdp-target-scsi0' -> 'scsi0'. Undefined if the name is not ours. */
export const keyOfName = (name: string): string | undefined => /^cdp-(?:job|target|filter|shield|read)-(.+)$/.exec(name)?.[1]

const bitmapPrefix = 'cdp-bitmap-'

export const bitmapName = (number: number): string => `${bitmapPrefix}${number}`

/** The number in a bitmap's name: higher is younger. Undefined if it is not ours. */
export const bitmapNumber = (name: string): number | undefined => {
  const digits = name.startsWith(bitmapPrefix) ? name.slice(bitmapPrefix.length) : ''
  return /^[0-9]{1,9}$/.test(digits) ? Number(digits) : undefined
}
