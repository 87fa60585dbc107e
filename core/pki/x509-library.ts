import type * as X509 from '@peculiar/x509'

type Metadata = Map<unknown, unknown>
type WithMetadata = {
  defineMetadata?: (key: unknown, value: unknown, target: object) => void
  getOwnMetadata?: (key: unknown, target: object) => unknown
  getMetadata?: (key: unknown, target: object) => unknown
}

// The dependency injection inside @peculiar/x509 refuses to load without these three functions of the decorator metadata proposal.
const provideReflectMetadata = (): void => {
  const reflect = Reflect as WithMetadata
  if (reflect.getMetadata !== undefined) return
  const store = new WeakMap<object, Metadata>()
  reflect.defineMetadata = (key, value, target) => {
    const metadata = store.get(target) ?? new Map<unknown, unknown>()
    store.set(target, metadata.set(key, value))
  }
  reflect.getOwnMetadata = (key, target) => store.get(target)?.get(key)
  reflect.getMetadata = (key, target) => {
    for (let at: object | null = target; at !== null; at = Reflect.getPrototypeOf(at)) {
      const metadata = store.get(at)
      if (metadata?.has(key)) return metadata.get(key)
    }
    return undefined
  }
}

/** @peculiar/x509, loaded when a certificate is first made: whoever only connects does not pay for it. */
export const loadX509 = async (): Promise<typeof X509> => {
  provideReflectMetadata()
  return import('@peculiar/x509')
}
