/** Memory that capture of a VM has by default. */
export const BUDGET_BYTES = 64 * 1024 * 1024

/** For people: whole MiB. */
export const mib = (bytes: number): string => (bytes / 2 ** 20).toFixed(0)
